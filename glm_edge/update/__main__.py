"""`python -m glm_edge.update` is the command `glm-edge update`."""

import sys

from glm_edge.cli.main import main

if __name__ == "__main__":
    main([sys.argv[0], "update", *sys.argv[1:]])
