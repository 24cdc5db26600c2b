"""``python -m avid_pipeline.train``, for torchrun."""

from avid_pipeline.train.cli import main

if __name__ == "__main__":
    main()
