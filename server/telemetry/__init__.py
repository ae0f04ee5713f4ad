"""What the server tells about itself: the metric catalogue and its exposition."""
