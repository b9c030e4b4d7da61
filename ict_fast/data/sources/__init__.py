"""What images are prepared from: the published forms of data sets, and folders of pictures."""
