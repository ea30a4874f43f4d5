"""Images with masks to score maps against: generated picture-book scenes and loaders of segmentation data sets."""
