"""The stages of `deploy`, one a module. Must not know of folders of results, but for the files that each writes."""
