"""avid-pipeline: data-first audio-visual self-supervised learning (AVID and AVID+CMA, CVPR 2021).

Importing this package imports neither torch nor DALI: each stage loads what it needs.
"""

__version__ = "0.1.0"
