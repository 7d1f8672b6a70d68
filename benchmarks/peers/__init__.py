"""The systems ours is compared with, each in an environment of its own; none is a dependency of the project."""
