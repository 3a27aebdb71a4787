"""Times on a GPU of this machine in the place of predicted ones, where one is here. Must not search."""
