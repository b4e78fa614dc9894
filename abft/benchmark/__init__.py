"""The paper's evaluation: StaICC's tasks and tests, and experiments made of them."""
