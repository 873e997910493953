// The playground's editor: CodeMirror with Python, bundled by the site's build into playground/editor.js. Its colours are
// the page's own (docs/site.css), so that it follows the scheme.

import { indentWithTab } from "@codemirror/commands";
import { python } from "@codemirror/lang-python";
import { indentUnit, syntaxHighlighting } from "@codemirror/language";
import { EditorView, keymap, lineNumbers } from "@codemirror/view";
import { classHighlighter } from "@lezer/highlight";
import { minimalSetup } from "codemirror";

// An editor in the place of a text area, which keeps the source.
export function open(area) {
  const view = new EditorView({
    doc: area.value,
    extensions: [
      minimalSetup,
      lineNumbers(),
      keymap.of([indentWithTab]),
      python(),
      indentUnit.of("    "),
      syntaxHighlighting(classHighlighter),
      EditorView.contentAttributes.of({ "aria-label": area.getAttribute("aria-label") }),
      EditorView.updateListener.of((update) => {
        if (update.docChanged) area.value = update.state.doc.toString();
      }),
    ],
  });
  area.before(view.dom);
  area.hidden = true;
  view.scrollDOM.tabIndex = 0; // a keyboard scrolls it
  return { write: (source) => view.dispatch({ changes: { from: 0, to: view.state.doc.length, insert: source } }) };
}
