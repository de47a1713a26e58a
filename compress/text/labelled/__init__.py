"""Labelled data: rows of files, folders and data sets, their labels, and parts that share nothing."""

from compress.text.labelled.base import Kind, Labelled, Row
from compress.text.labelled.config import LabelledConfig, Mixed
from compress.text.labelled.load import load_labelled

__all__ = ["Kind", "Labelled", "LabelledConfig", "Mixed", "Row", "load_labelled"]
