"""Episodes as datasets in files, for `openvla record`."""
