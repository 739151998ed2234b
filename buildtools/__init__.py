"""Steps of building and releasing, for setup.py and the Makefile. Nothing of it is installed."""
