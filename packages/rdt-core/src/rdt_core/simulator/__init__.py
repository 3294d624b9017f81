"""Predicts what a sync takes, from manifests, a topology and link speeds. Pure: no torch, no ray, no GPU."""
