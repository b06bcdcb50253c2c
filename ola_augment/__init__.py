"""Image augmentation that learns itself while the model trains."""
