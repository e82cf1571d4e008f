"""One gateway process: HTTP application, router, fleet and batches put together."""
