"""Files of weights: official names and ours, reading and writing, downloads."""
