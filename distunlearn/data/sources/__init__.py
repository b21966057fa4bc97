"""Images where they lie: scikit-learn, IDX files, torchvision, folders, tar files of others."""
