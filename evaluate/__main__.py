"""``python -m avid_pipeline.evaluate``, for torchrun."""

from avid_pipeline.evaluate.cli import main

if __name__ == "__main__":
    main()
