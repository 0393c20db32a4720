"""The paper's own figures to lay results beside: Tables 1, 5 and 6 of EUPE (arXiv 2603.22387), in the paper's units.

Classification and segmentation in per cent, NYUv2 in metres of RMSE (lower is better). A dash in the paper is None
here. The vision-language columns need a language model of 7B and are not evaluated here.
"""

COLUMNS = ("IN1k-ZS", "IN1k-KNN", "SPair", "NYUv2", "ADE20k")
LOWER_IS_BETTER = ("NYUv2",)

# column -> (evaluation, metric, factor to the paper's unit)
SOURCES = {
    "IN1k-ZS": ("zero_shot", "top1", 100.0),
    "IN1k-KNN": ("knn", "top1", 100.0),
    "SPair": ("correspondence", "pck", 100.0),
    "NYUv2": ("depth", "rmse", 1.0),
    "ADE20k": ("segmentation", "mIoU", 100.0),
}

# model -> one figure a column; Table 1, then 5, then 6
ROWS: dict[str, tuple[float | None, ...]] = {
    "PEcore-B": (78.4, 79.7, 25.9, 0.641, 37.4),
    "PEspatial-B": (None, None, 42.2, 0.389, 45.5),
    "SigLIP2-B": (78.2, 83.2, 32.8, 0.512, 41.6),
    "DINOv3-ViT-B": (None, 83.0, 51.3, 0.373, 51.8),
    "RADIOv2.5-B": (74.6, 81.9, 48.7, 0.435, 49.0),
    "DUNE-B": (None, 42.5, 39.4, 0.375, 40.9),
    "EUPE-ViT-B": (79.7, 84.1, 51.3, 0.391, 52.4),
    "PEcore-T": (52.9, 61.7, 20.2, 0.756, 22.0),
    "PEspatial-T": (None, None, 18.4, 0.589, 28.5),
    "EUPE-ViT-T": (50.5, 66.3, 37.2, 0.571, 36.7),
    "PEcore-S": (62.8, 71.9, 28.6, 0.599, 33.7),
    "PEspatial-S": (None, None, 30.8, 0.464, 38.6),
    "DINOv3-ViT-S": (None, 78.6, 47.9, 0.404, 46.9),
    "EUPE-ViT-S": (69.8, 78.2, 46.5, 0.455, 46.6),
    "DINOv3-ConvNeXt-T": (None, None, 35.7, 0.448, 42.7),
    "EUPE-ConvNeXt-T": (None, None, 41.3, 0.430, 43.5),
    "DINOv3-ConvNeXt-S": (None, None, 34.7, 0.432, 44.8),
    "EUPE-ConvNeXt-S": (None, None, 40.1, 0.388, 46.8),
    "DINOv3-ConvNeXt-B": (None, None, 35.0, 0.420, 46.3),
    "EUPE-ConvNeXt-B": (None, None, 37.7, 0.365, 48.9),
}
