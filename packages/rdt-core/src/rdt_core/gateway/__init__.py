"""An HTTP front for those who drive weight sync from outside: ``python -m rdt_core.gateway``.

It speaks the requests of AReaL's weight-update gateway in ``rdt`` mode. ``app`` has the routes, ``pairs``
what they do, ``controller`` the same for Python callers. Needs ``rdt-core[gateway]``.
"""
