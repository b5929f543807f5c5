"""`python -m glm_edge.serve` is the command `glm-edge serve`."""

import sys

from glm_edge.cli.main import main

if __name__ == "__main__":
    main([sys.argv[0], "serve", *sys.argv[1:]])
