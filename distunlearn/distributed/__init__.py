"""Talk between the processes of a run: joining, collectives, batch statistics."""
