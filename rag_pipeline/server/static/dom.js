// Elements of the page. All text goes in as text, never as mark-up.

export const $ = (id) => document.getElementById(id);

export const make = (tag, text, className) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
};
