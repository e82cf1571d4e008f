"""One gateway process: the HTTP application, router, fleet and batches together."""
