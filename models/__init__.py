"""Trained models, the programs that made them, and what export.py needs to read other people's."""
