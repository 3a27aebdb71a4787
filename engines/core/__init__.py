"""What both packages need of graphs, files and runtimes. Must not load a runtime at import, or import the packages."""
