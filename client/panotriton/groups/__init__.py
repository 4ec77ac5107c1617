"""Groups on disk: folders, data sets, reports, agreement of scores."""
