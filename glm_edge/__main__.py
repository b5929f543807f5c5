"""`python -m glm_edge` is the command `glm-edge`."""

from glm_edge.cli.main import main

if __name__ == "__main__":
    main()
