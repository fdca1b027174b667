"""SGLang's HTTP server with this project's access rules, protocol checks and stop."""
