"""Records of runs on a GPU, and the tables that are made from them."""
