"""The paper's figures again, one command each."""
