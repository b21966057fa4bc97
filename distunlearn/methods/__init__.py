"""Ways to forget, one readable file each: settings, needs, search space, texts and loss (`base.Method`).

Their names are in `config/registry.py`; a module is imported when its method is asked for.
"""
