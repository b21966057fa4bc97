"""Per-sample gradients: in closed form, as sketches, as norms."""
