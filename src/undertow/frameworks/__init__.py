"""The only folder whose files import a framework, each when it is first needed."""
