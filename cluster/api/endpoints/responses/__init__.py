"""/v1/responses: create, retrieve, stream again, cancel and delete responses, and list their input."""
