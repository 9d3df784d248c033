"""The main job: train a net on a real data set by FDFA or by one of the paper's other methods."""
