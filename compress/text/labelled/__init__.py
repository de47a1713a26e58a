"""Labelled data: rows of files, folders and data sets, their labels, and parts that share nothing."""
