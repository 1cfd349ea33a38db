"""GLM-5.2 as one Python package: run, serve, plan, learn, explain. Importing it does not import torch."""

__version__ = "0.1.0"
