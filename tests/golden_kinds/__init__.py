"""One handler module per family of fixtures; each exposes `KINDS = {kind: check(path)}`. See `dispatch`."""
