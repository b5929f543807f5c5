"""The command `glm-edge`; scripts under experiments/ run the same code."""
