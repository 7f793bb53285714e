"""Measurements, records of runs on a GPU, and the tables and plots that are made from them."""
