"""Random views: draws by counter, crops of the photo, colour operations on batches."""
