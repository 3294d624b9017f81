"""Models as pure tables: checkpoint tensors from a config.json, and how trainers and engines lay them out.

Neither weights nor a GPU nor torch are needed; `rdt manifest`, `rdt plan` and `rdt simulate` stand on this.
"""
