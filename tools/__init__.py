"""What works on this project, and is no part of the package."""
