"""Figures made from signals: gates, utility, similarity, distances to the retrained encoder."""
