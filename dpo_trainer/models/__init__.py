"""Models: a name or an object comes in; a policy that can be trained goes out, with what must be known of it."""
