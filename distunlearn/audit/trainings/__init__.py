"""Trainings that an audit starts: pooled shadow encoders and stress tests."""
