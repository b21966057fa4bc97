"""Which image lies where, with its digest, role and label."""
