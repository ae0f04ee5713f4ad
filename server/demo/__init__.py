"""The show: a real model that pip installs, a small data set, and a run that proves co-serving before your eyes."""
