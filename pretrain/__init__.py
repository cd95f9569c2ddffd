"""The library behind train.py: one noun a module, imports pointing one way (see CONTRIBUTING.md)."""
