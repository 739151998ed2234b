"""Tools for work on this project, which are no part of the package."""
