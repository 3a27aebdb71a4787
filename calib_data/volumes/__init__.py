"""What is done to an image before a model sees it.

Flow: cases of a source (`case`) -> read, turned, cropped, resampled, normalized as a recipe says (`spec`, `prepare`) ->
patches -> arrays of a model's input (`samples`). Recipes also come from nnU-Net's plans and MONAI's bundles.
It must not know of quantization, and must not tell anyone what a file or a folder is called.
"""
