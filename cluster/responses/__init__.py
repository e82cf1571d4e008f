"""Responses of OpenAI's Responses API as values: what is stored of them, and the events that follow from it. No HTTP and no database."""
